"""LAMMPS: `pair_style gaq` as a plugin for the user's LAMMPS, and a check of it against ASE.

`gaq.lammps.installation` finds LAMMPS and what it was built with, `gaq.lammps.build` compiles the plugin,
`gaq.lammps.simulation` runs structures in LAMMPS, and `gaq.lammps.check` compares them with the ASE calculator. The
folder ``pair_style`` holds the C++ of the pair style, under LAMMPS's licence.
"""
