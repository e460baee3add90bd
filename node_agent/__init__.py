"""The node agent: measures one GPU host and tells the balancer what it found."""

__version__ = "0.1.0"
