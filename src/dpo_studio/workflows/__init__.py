"""Commands: one module each. The command line and the Python API call these."""
