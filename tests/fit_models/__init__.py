"""Models for the tests of the prediction: facts of public ones, and small ones to be loaded."""
