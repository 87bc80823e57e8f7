"""Requests that come and go: what is asked, who answers, how it is measured, what is told of it.
The command is bench/traffic.py.
"""
