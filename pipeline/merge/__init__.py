"""`bd-merge merge`: any method that needs nothing but files, on checkpoint files, tensor by tensor."""
