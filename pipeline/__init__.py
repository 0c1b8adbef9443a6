"""The distributed pipeline around `bd_core`: everything that touches disk, processes or a tracker."""
