"""The runtime of one open model: slots, requests, programs, and what is submitted to the device.

All state changes are synchronous, on the event loop's thread.
"""
