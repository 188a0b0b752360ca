"""The state machine of trees and allocator on models with recurrent states.

A state is 2 to 48 times as large as a small page of KV, and one to three of them fill a large page.
"""

from tests.models.radix_machine import JengaMachine


class StateMachine(JengaMachine):
    geometries = ((8, 1), (6, 3), (12, 2), (48, 1), (6, 3, 1), (12, 4, 2), (4, 24, 3))
    states = True

    @staticmethod
    def sizes(packings):
        return [3 + states // packings[-1] for states in (6, 12, 24)]


TestStateMachine = StateMachine.TestCase
