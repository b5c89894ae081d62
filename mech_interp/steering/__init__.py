"""Steering vectors by name: see `mech_interp.steering.registry`."""
