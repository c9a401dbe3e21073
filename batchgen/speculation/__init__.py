"""The arithmetic of speculation: what a tree costs and what it is expected to yield."""
