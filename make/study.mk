# The paper's claims at the scale of small machines: docs/study.md, from docs/study/runs.jsonl. Not part of `make test`.

.PHONY: study study-report
$(BUILD)/venv-study/ready: tests/study/requirements.txt
STUDY_RUN = PYTHONPATH=bindings/python PLORA_LIBRARY=$(abspath $(BUILD))/libplora.so $(BUILD)/venv-study/bin/python \
            tests/study/study.py --build $(BUILD)
study: $(BUILD)/libplora.so $(BUILD)/finetune $(BUILD)/venv-study/ready
	$(STUDY_RUN) $(if $(STUDY),--part $(STUDY)) $(if $(WORKERS),--workers $(WORKERS))
study-report: $(BUILD)/venv-study/ready
	$(STUDY_RUN) --report
