"""Pages that show runs: what the files of a run say (``judge``, ``findings``, ``curves``), drawn as charts (``charts``)
and pictures (``gallery``) of one self-contained page (``page``). No network runs here."""
