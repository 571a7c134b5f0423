"""Tessera's public Python API.

In: plain arguments. Out: results of the workflows. Loads nothing until it is used.
"""
