"""HTTP/1.1 on asyncio protocols: client connections in, node connections out, and nothing of tenants or health.

The hot path: per request few objects and copies, per chunk none that is not needed. docs/adr/0002 says why.
"""
