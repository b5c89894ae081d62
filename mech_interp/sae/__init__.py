"""SAEs by name: see `mech_interp.sae.registry`."""
