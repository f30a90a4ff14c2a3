"""The commands of the released CALM code, translated into this package."""
