"""Stages, configuration and runs: what run.sh and the step scripts stand on."""
