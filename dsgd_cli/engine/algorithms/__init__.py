"""The distributed optimisers, one module each, as pure functions and state machines."""
