"""A fleet of inference engines and its balancers in virtual time: discrete events, no tokens, no clock, no sockets."""
