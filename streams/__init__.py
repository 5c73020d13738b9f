"""Streams: events, their codecs, and the Kafka edge."""
