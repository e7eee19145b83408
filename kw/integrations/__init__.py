"""Adapters for other people's trainers and model hubs. Each module imports its host when it is
imported itself; :mod:`.core` needs torch alone.
"""
