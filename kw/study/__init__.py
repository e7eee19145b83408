"""Many runs and a table of them: studies, and reproductions of published tables.

A study's file (:mod:`files`) and a published table (:mod:`published`, smaller by :mod:`scale`) say
which :mod:`runs` there are. :mod:`launch` starts what is not done. :mod:`summary` tabulates a
study, :mod:`report` a published table beside what was measured; :mod:`plots` draws both.
"""
