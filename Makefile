# The five commands that people look for. CONTRIBUTING.md says when to use which.
BIN = .venv/bin
.PHONY: install check test unit clean

install: .venv/installed

.venv/installed: pyproject.toml requirements.lock
	python3 -m venv .venv
	$(BIN)/pip install --quiet -c requirements.lock -e '.[test]'
	touch $@

check: install
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/check

unit: install
	$(BIN)/pytest -n 2 tests/unit

test: check unit
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/integration --ignore tests/integration/test_signals.py
	$(BIN)/pytest tests/integration/test_signals.py

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
