"""What a run looked like: its records as charts and tables, for people and for other tools.

    runs ─▶ series ─▶ figures ─▶ svg ─▶ page      one HTML file that needs nothing else
                              └▶ png              where matplotlib is installed

`charts` holds the values between `figures` and the two renderers, which decide nothing about the
data. Imports contract and the standard library; yaml and matplotlib inside functions. The SVG is
our own text: a chart is some lines and labels, `dsgd train` can write a report in milliseconds on
any machine, and a page without scripts can be mailed. A plotting library was the alternative.
"""
