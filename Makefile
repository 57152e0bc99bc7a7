# make run    the low-data comparison on the toy world, from nothing to table and figure
# make test   every chapter and every test
# make lint   format, style, types, and notebooks and package in step
# make check  lint, and the quick tests
# make reproduce  every experiment at scale ci, into runs/ci, and compared with results/; goes on where it was cut
# All install into .venv first. Also: lab, bench, lock, readme, clean.
PY = .venv/bin/python
STAMP = .venv/.installed

EXPERIMENTS = $(filter-out index,$(basename $(notdir $(wildcard nbs/9_experiments/[a-z]*.ipynb))))
ASK_LOW_DATA = figure_5 scoreboard

.PHONY: run test lab bench lint check reproduce lock readme clean install
.DELETE_ON_ERROR:

run: install
	@.venv/bin/glsd reproduce low_data --scale ci

test: install
	OMP_NUM_THREADS=1 $(PY) .ci/notebooks.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

lab: install
	.venv/bin/jupyter lab nbs/tour.ipynb

bench: install
	$(PY) benchmarks/run.py

lint: install
	@$(PY) .ci/check.py

check: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests

# an executed notebook takes its place when it is whole, so what is there is done; -k: one that fails does not stop the others
reproduce: install
	@$(MAKE) -k $(EXPERIMENTS:%=runs/ci/.%.done); made=$$?; .venv/bin/glsd reproduce --compare runs/ci && exit $$made

$(ASK_LOW_DATA:%=runs/ci/.%.done): runs/ci/.low_data.done

runs/ci/.%.done: nbs/9_experiments/%.ipynb
	.venv/bin/glsd reproduce $* --out runs/ci/$* $(if $(filter $*,$(ASK_LOW_DATA)),-p runs=$(CURDIR)/runs/ci/low_data)
	@touch $@

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
