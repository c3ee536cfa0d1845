"""Bounded readers of foreign bytes. Only this folder parses what comes from outside."""
