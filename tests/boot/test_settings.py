"""No setting is ignored: each that SGLang's memory, cache and scheduling code reads is honoured by
SGLang's own code, honoured by ours, or refused or warned of. Readers are found in the source."""

from __future__ import annotations

import ast
import functools
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from sglang_jenga.boot.environment_rules import ENVIRONMENT_RULES
from sglang_jenga.boot.flag_rules import FLAG_RULES
from sglang_jenga.boot.model_rules import MODEL_RULES
from tests.boot import settings_known as known
from tests.boot import settings_scan as scan

OURS = Path(__file__).resolve().parents[2] / "sglang_jenga"
RULED = frozenset([rule.field for rule in FLAG_RULES] + [rule.name for rule in ENVIRONMENT_RULES])
REFUSALS = RULED | {rule.why for rule in MODEL_RULES}
BY_SGLANG = {
    setting: module
    for module, settings in known.HONOURED_BY_SGLANG.items()
    for setting in settings.split()
}
OPTIONS = {
    setting: rule for rule, settings in known.OPTIONS_OF_REFUSED.items() for setting in settings
}
_KINDS = {
    **{place: "replaced" for places in known.REPLACED.values() for place in places},
    **dict.fromkeys(known.KEPT, "runs"),
    **{place: "refused" for places in known.REFUSED.values() for place in places},
}


def kind_of(module: str, function: str) -> str:
    """Whether code of SGLang runs under the flag, is replaced, or is refused."""
    matching = [place for place in _KINDS if scan.lies_in(module, function, place)]
    return _KINDS[max(matching, key=len)] if matching else "runs"


@functools.cache
def readers() -> dict[str, dict[str, set[str]]]:
    """Setting -> kind of code -> modules that read it, in the scope; refused files are left out."""
    arguments = scan.server_arguments()
    found: dict = defaultdict(lambda: defaultdict(set))
    for place in known.SCOPE:
        for module, path in scan.sources(place.partition("::")[0]):
            if kind_of(module, "") == "refused":
                continue
            for setting, functions in scan.readers_in(path, arguments).items():
                for function in functions:
                    if "::" not in place or scan.lies_in(module, function, place):
                        found[setting][kind_of(module, function)].add(module)
    return {setting: dict(kinds) for setting, kinds in found.items()}


def unaccounted(setting: str, kinds: dict[str, set[str]]) -> str | None:
    """Why nothing is known of a setting that these modules read, or None."""
    if setting in RULED or not kinds.keys() - {"refused"}:
        return None
    if "runs" not in kinds:
        if setting in known.HONOURED_HERE or setting in OPTIONS or setting in BY_SGLANG:
            return None
        return f"{setting} is read by replaced code only: {sorted(kinds['replaced'])}"
    if setting in BY_SGLANG:
        return None
    return f"{setting} is new in {sorted(kinds['runs'])}: does a jenga server do what it says?"


def test_every_setting_that_is_read_is_in_a_table():
    found = [unaccounted(setting, kinds) for setting, kinds in sorted(readers().items())]

    assert [line for line in found if line is not None] == []


def test_no_setting_is_in_two_tables():
    tables = Counter([*RULED, *BY_SGLANG, *known.HONOURED_HERE, *OPTIONS])
    listed = sum(len(settings.split()) for settings in known.HONOURED_BY_SGLANG.values())

    assert [setting for setting, times in tables.items() if times > 1] == []
    assert listed == len(BY_SGLANG)


@pytest.mark.parametrize("module", known.HONOURED_BY_SGLANG)
def test_settings_honoured_by_sglang_are_read_by_code_that_runs(module):
    read = scan.readers_in(scan.SRT / module, scan.server_arguments())

    for setting in known.HONOURED_BY_SGLANG[module].split():
        kinds = {kind_of(module, function) for function in read.get(setting, ())}
        assert "runs" in kinds, setting
        assert setting in readers(), f"{setting} is no matter of memory, cache or scheduling"


@pytest.mark.parametrize("setting", known.HONOURED_HERE)
def test_settings_honoured_here_are_read_here(setting):
    module, expression = known.HONOURED_HERE[setting]

    tree = ast.parse((OURS / f"{module}.py").read_text())
    assert expression in {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert "runs" not in readers()[setting], "SGLang's own code reads it"


def test_what_is_refused_or_replaced_exists():
    assert known.REFUSED.keys() | known.OPTIONS_OF_REFUSED.keys() <= REFUSALS
    assert all((OURS / f"{module}.py").exists() for module in known.REPLACED)
    for place in (*known.SCOPE, *_KINDS):
        file, _, function = place.partition("::")
        assert (scan.SRT / file).exists(), place
        assert not function or function in scan.functions_in(scan.SRT / file), place
    for setting in OPTIONS:
        assert "runs" not in readers()[setting], setting


# ---- that the test can fail -----------------------------------------------------------------

NEW = '''
from sglang.srt.environ import envs
_LIMIT = envs.SGLANG_NEW_LIMIT.get()
def admit(self, server_args):
    """SGLANG_ONLY_TOLD_OF is not read."""
    schedule = get_schedule()
    if schedule.new_ratio and get_exec().mamba.new_interval:
        return os.environ.get("SGLANG_NEW_WAY")
    return getattr(server_args, "new_flag") + self.new_size + _LIMIT
'''


def test_readers_are_found_however_they_read(tmp_path):
    path = tmp_path / "new.py"
    path.write_text(NEW)
    arguments = frozenset({"new_ratio", "new_interval", "new_flag", "new_size"})

    found = scan.readers_in(path, arguments)

    names = ("SGLANG_NEW_LIMIT", "SGLANG_NEW_WAY", "new_ratio", "new_interval", "new_flag")
    assert found == {name: {"admit"} for name in names}


@pytest.mark.parametrize(
    ("setting", "kinds", "told"),
    [
        ("a_new_flag", {"runs": {"managers/scheduler.py"}}, "is new in ['managers/scheduler.py']"),
        ("a_new_flag", {"replaced": {"mem_cache/radix_cache.py"}}, "is read by replaced code only"),
        ("a_new_flag", {"refused": {"mem_cache/storage/x.py"}}, None),
        ("enable_lmcache", {"runs": {"managers/scheduler.py"}}, None),
        ("page_size", {"runs": {"managers/scheduler.py"}}, None),
    ],
)
def test_new_setting_is_told_of(setting, kinds, told):
    line = unaccounted(setting, kinds)

    assert line is None if told is None else told in line


def test_setting_that_only_replaced_code_reads_does_not_count_as_honoured_by_sglang():
    """The ones that a jenga server once ignored, all of them read somewhere in SGLang."""
    for setting in ("radix_eviction_policy_config", "swa_full_tokens_ratio"):
        assert "runs" not in readers()[setting]
    assert kind_of("mem_cache/memory_pool.py", "MambaPool.copy_from") == "replaced"
    assert kind_of("mem_cache/memory_pool.py", "MHATokenToKVPool.__init__") == "runs"
