"""Commands of all tables, check of the simulator, and the documents that show both."""
