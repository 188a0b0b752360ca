"""The state machine of trees and allocator on models of full and window layers."""

from tests.models.radix_machine import JengaMachine


class TokenMachine(JengaMachine):
    geometries = ((1,), (1, 1), (3, 2), (2, 5), (1, 4), (4, 2, 1))

    @staticmethod
    def sizes(packings):
        return [2 + smalls // min(packings) for smalls in (10, 20, 30, 40)]


TestTokenMachine = TokenMachine.TestCase
