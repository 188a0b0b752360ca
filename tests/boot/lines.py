"""How the lines of a refusal begin."""

WITH = "sglang-jenga: --memory-backend jenga does not work with "
SERVE = "sglang-jenga: --memory-backend jenga does not serve "
