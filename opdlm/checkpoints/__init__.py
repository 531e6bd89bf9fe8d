"""Folders in, folders out: load, convert, adapters, export."""
