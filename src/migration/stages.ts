/** Points of a migration in order, on either side. */
export type Stage =
  | 'source: accepted'
  | 'source: round sent'
  | 'source: held'
  | 'source: disks handed over'
  | 'source: state sent'
  | 'source: ready heard'
  | 'source: commit sent'
  | 'source: running heard'
  | 'target: accepted'
  | 'target: round taken'
  | 'target: state taken'
  | 'target: ready sent'
  | 'target: commit heard'
  | 'target: running';

/** Where tests stall, kill and cut; nobody else replaces it. */
export const stages: { reached: (stage: Stage) => Promise<void> | void } = { reached: () => {} };
