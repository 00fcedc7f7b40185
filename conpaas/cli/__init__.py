"""The command line: `conpaas` is a client of the SDK, `managerc` talks straight to a manager.

Commands read their words, do one thing by the SDK and show the answer; nothing else knows of terminals.
"""
