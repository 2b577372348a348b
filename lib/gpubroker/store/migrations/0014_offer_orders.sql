-- The other orders within one combination of model and count: as in 0002, the price alone has served its own so far.
CREATE INDEX offer_gpu_per_gpu ON offer (gpu, gpu_count, per_gpu, id)
    WHERE gone_at IS NULL AND quarantined IS NULL AND availability <> 'none';
CREATE INDEX offer_gpu_per_vram ON offer (gpu, gpu_count, per_vram, id)
    WHERE gone_at IS NULL AND quarantined IS NULL AND availability <> 'none';
CREATE INDEX offer_gpu_value ON offer (gpu, gpu_count, value, id)
    WHERE gone_at IS NULL AND quarantined IS NULL AND availability <> 'none';
