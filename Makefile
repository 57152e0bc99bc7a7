# make run    the low-data comparison on the toy world, from nothing to table and figure
# make test   every chapter and every test
# make check  format, lint, types, notebooks and package in step, and the quick tests
# All install into .venv first. Also: lab, bench, lock, readme, clean.
PY = .venv/bin/python
STAMP = .venv/.installed

.PHONY: run test lab bench check lock readme clean install
.DELETE_ON_ERROR:

run: install
	@.venv/bin/glsd reproduce low_data --scale ci

test: install
	OMP_NUM_THREADS=1 $(PY) .ci/notebooks.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile tests

lab: install
	.venv/bin/jupyter lab nbs/tour.ipynb

bench: install
	$(PY) benchmarks/run.py

check: install
	@$(PY) .ci/check.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m "not slow" tests

lock:
	@$(PY) .ci/lock.py $$(command -v uv || echo .venv/bin/uv)

readme: install
	@$(PY) .ci/readme.py

clean:
	rm -rf .venv

install: $(STAMP)

$(STAMP): .ci/requirements.txt .ci/install settings.ini setup.py
	@sh .ci/install
	@touch $@
