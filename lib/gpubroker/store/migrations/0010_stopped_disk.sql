-- What each GB above the disk that the price covers costs while the instance is stopped, micro-USD per hour.
ALTER TABLE offer ADD COLUMN stopped_disk_micro_gb_h bigint NOT NULL DEFAULT 0;
