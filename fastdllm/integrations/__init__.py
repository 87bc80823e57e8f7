"""The product in other people's libraries. Each file needs its own library, and only when it is
asked for.
"""
