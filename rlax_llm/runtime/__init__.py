"""Devices, processes, compiled programs and the command line."""
