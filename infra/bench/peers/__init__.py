"""The public peers behind one signature each; every module here runs in its peer's own environment."""
