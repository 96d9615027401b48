"""The command line: ``entry`` dispatches, ``flags`` are declared, one module a command."""
