"""The commands of the console script, one file a command.

``parser`` describes the flags and ``run`` runs the command; neither this package nor any ``parser``
imports anything heavy.
"""
