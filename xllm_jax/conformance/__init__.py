"""The conformance kit: does a new network keep what the rest relies on?"""
