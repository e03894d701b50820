"""What several test modules share: made-up data and models, jobs and runs over them, servers, processes, devices.

Tests import from here (`from support.NAME import ...`) and never from one another.
"""
