"""HTTP/1.1 without I/O: heads and bodies as bytes (RFC 9110, RFC 9112), as strict as the RFCs let.

Two parsers that read one message differently let a caller smuggle a second request past the first
of them. Whatever the RFCs call invalid is therefore refused, never repaired.
"""
