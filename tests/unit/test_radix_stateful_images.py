"""The state machine of trees and allocator on models whose images lie before the text."""

from tests.models.image_machine import ImageMachine

TestImageMachine = ImageMachine.TestCase
