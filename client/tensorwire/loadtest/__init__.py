"""The load tester behind `tensorwire bench`: what is sent when, what came of it, if it counts."""
