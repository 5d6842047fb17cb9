"""A world whose constrained optimum is known, for tests of algorithms: this package's and anyone's."""
