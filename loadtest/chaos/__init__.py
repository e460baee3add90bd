"""The balancer's promises, put to the test: nodes and stores that break under load, and a table of what happened."""
