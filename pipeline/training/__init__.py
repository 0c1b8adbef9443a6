"""Fitting: a plain loop, its resumable state, and the stage that runs it wherever an executor puts it."""
