"""One race: the ways of decoding a request of one shape, how they are checked and timed, and what
is told of them. The command is bench/end_to_end.py.
"""
