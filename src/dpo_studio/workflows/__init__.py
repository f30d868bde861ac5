"""Verbs: one module each. The command line, the Python API and the studio all call these."""
