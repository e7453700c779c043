"""What a compiler says of a program before any device has run it.

Knows HLO text, jaxprs, chips and topologies; nothing of objectives or configs.
"""
