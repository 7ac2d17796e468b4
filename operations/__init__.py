"""The vocabulary that every room of Hive speaks: operations, events, hosts, errors. No I/O."""
