"""Voxtral Voice Clone: recovers the withheld codec encoder of Voxtral-4B-TTS-2603."""
